"""The lexicon of the demo: every single word that its pictures ask for; three to seven letters each."""

_WORDS = """
acorn actor admiral agent alarm album almond amber anchor angle animal ankle answer apple apron arch
arena arm armor arrow artist ash atlas attic autumn axis bacon badge baker balcony ball bamboo banana
banjo barley barn barrel basin basket battery beach beacon bean bear beaver bed bee beetle bell belt
bench berry bird biscuit blanket blossom board boat bonnet book boot border bottle boulder bowl box
bramble branch brass bread breeze brick bridge brook broom brush bubble bucket buckle buffalo builder
bundle burrow bus butter button cabbage cabin cable cactus cake camel camera camp canal candle canoe
canvas cap captain car caravan carbon card cargo carpet carrot cart castle cat cattle cave cedar ceiling
cellar cello cement chain chair chalk channel cheese cherry chest chicken chimney cider circle circus
city clay cliff clock cloth cloud clover coach coal coast coat cobbler coconut coffee coin collar colony
column comet compass cook copper coral cork corn corner cotton country cousin cow crab cradle crane
crayon creek cricket crow crown crystal cup cupboard curtain cushion cycle dairy daisy dam dance dawn
deer desert desk dial diamond dinner dish doctor dog doll dolphin donkey door dove dragon drawer dream
drum duck dust eagle ear earth easel east echo eclipse eel egg elbow elder elm engine estate evening
fabric factory falcon family farm farmer feather fence fern ferry fiddle field fig finch finger fire fish
flag flame flask flint flock flour flower flute fog folder forest fork fort fossil fountain fox frame
frost fruit funnel galaxy gallery game garage garden garlic gate geyser giant ginger giraffe glacier
glass globe glove goat gold goose grain granite grape grass gravel guide guitar gull habit hammer hammock
handle harbor harp harvest hat hawk hazel heart hedge helmet herb heron hill hinge holly honey hood hook
horizon horn horse hotel house hut ice igloo inn insect iris iron island ivory ivy jacket jaguar jar
jelly jewel jigsaw judge juice jungle kayak kennel kettle key king kitchen kite kitten knee knife knot
ladder lady lagoon lake lamb lamp lantern laurel lava lawn leaf leather lemon lentil letter library lily
lime linen lion lizard llama lobster lock locket log lotus lunch magnet magpie mango map maple marble
market marsh mask mast match meadow medal melon merchant metal mill mineral mint mirror mitten moat mole
monkey moon moose morning moss moth motor mouse mud muffin museum music mustard nail napkin narrow nature
nectar needle nest net nickel night north nose number nurse nut oak oasis oats ocean octopus office olive
onion opal orange orbit orchard organ otter oven owl oyster paddle page paint palace palm panda panther
paper parade parcel park parrot parsley pasture path peach peacock peak pear pearl pebble pelican pen
pencil penguin pepper piano picnic pigeon pillow pilot pine pipe pirate planet plank plate plum pocket
poet pond pony poplar poppy porch port potato pottery powder prairie prince puddle pumpkin puppy purse
puzzle quail quarry quartz queen quilt quiver rabbit radio radish raft rail rain raven razor reef ribbon
rice river road robin rocket roof root rope rose ruby rug saddle sail salad salmon salt sand satchel
saucer scarf school scissor sea seal season seed shadow shark sheep shell shelf ship shirt shoe shore
shovel shrimp sign silk silver sister skate sky sled sleeve snail snow soap sock soil soldier song soup
south spade sparrow spear spice spider spinach spoon spring square stable stair star statue steam steel
stone stool storm stove straw stream street string sugar suit summer sun sunset swan table tailor tea
teacher temple tent theatre thimble thistle thorn thread throne thunder ticket tiger tile timber toast
tomato tongue torch tower town toy tractor trail train tray tree tribe trout trumpet trunk tulip tunnel
turkey turnip turtle twig uncle valley van vase velvet village vine violet violin visitor voyage wagon
wall walnut walrus water wave wax weather weaver well west whale wheat wheel whistle willow wind window
winter wizard wolf wood wool worker world wren yacht yard yarn zebra
"""

LEXICON: tuple[str, ...] = tuple(sorted({word for word in _WORDS.split() if 3 <= len(word) <= 7}))
