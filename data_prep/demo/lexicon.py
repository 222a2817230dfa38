"""The lexicon of the demo: all single words that its pictures ask for, of three to six letters.

All sides of the split share it, as readers share a language. Pictures and numbers are not shared.
"""

_WORDS = """
acorn agent album amber angle ankle apple arch arm arrow ash attic axis badge ball banana barley
barrel basket beacon bear bed beetle belt berry board bonnet boot bottle box brass breeze bridge broom
bubble buckle burrow butter cabin cactus camel camp candle canvas car card carpet cart cat cave cellar
cement chair cheese chest circle city cliff cloth clover coal coat coin colony comet copper cork corner
cousin crab crane creek crown cycle daisy dance deer desk dinner doctor doll door dragon dream duck eagle
earth east eel elbow elm estate falcon farm fence ferry field finch fire flag flask flock flower fog
forest fort fox frost funnel game garden gate giant glass glove gold grain grass guide gull hammer harbor
hat hazel hedge herb hill holly hood horn hotel hut igloo insect iron ivory jacket jar jewel judge jungle
kennel key kite knee knot lady lake lamp lava leaf lentil lily linen lizard lock log lunch magpie map
marble marsh mast meadow melon mill mirror moat monkey moose moth mouse muffin music napkin nature needle
net night nose nurse oak oats office onion orange organ oven oyster page palace panda parade park path
peak pearl pen pepper picnic pillow pine pirate plank plum poet pony poppy port powder puddle purse quail
quartz quilt rabbit radish rail raven reef rice road rocket root rose rug sail salmon sand scarf sea
season shadow sheep shell shirt shore shrimp silk sister sky sleeve snow sock song south spear spider
spring stable star steam stone storm straw street sugar summer sunset table tea tent thread ticket tile
toast tongue tower toy train tree trout tulip turkey turtle uncle van velvet violet voyage wall walrus
wave weaver west wheat willow window wizard wood worker wren yard zebra
"""
LEXICON: tuple[str, ...] = tuple(_WORDS.split())
