"""The classes of CelebAMask-HQ that face parsing gives and blend masks use, and their map's size."""

LABEL_SIDE = 512  # pixels, of the square label map of a crop box
CLASS_COUNT = 19

BACKGROUND = 0
SKIN = 1
BROWS = (2, 3)
EYES = (4, 5)
NOSE = 10
MOUTH = 11  # what shows between the lips
UPPER_LIP = 12
LOWER_LIP = 13
NECK = 14
