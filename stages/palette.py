"""Colours of all plots: the palette of Okabe and Ito, which colour-blind readers can tell apart."""

ORANGE, BLUE, GREEN, PINK, SKY, AMBER = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY, BLACK = "#777777", "#000000"
