"""The head in a picture: which mesh points are what, the head's own axes, and the mouth's distances.

Every index of MediaPipe's face mesh that the package uses is named here, once. Left and right are always
the subject's own, never the picture's: the right eye is the one on the left of a portrait. Edges and lids run
from the subject's right to the left, as one reads a portrait; rings go round. Distances on a face are told in
eye distances, from outer corner to outer corner: neither the face's size nor a zoom counts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MESH_POINTS = 478
SKIN_POINTS = 468  # of the mesh, the first; the other ten are the irises

FOREHEAD, NOSE_BASE, CHIN = 10, 2, 152
BELOW_NOSE_TIP = 1
RIGHT_EYE_OUTER, RIGHT_EYE_INNER, LEFT_EYE_INNER, LEFT_EYE_OUTER = 33, 133, 362, 263  # corners
RIGHT_CORNER, LEFT_CORNER = 61, 291  # of the mouth, outside
INNER_RIGHT_CORNER, INNER_LEFT_CORNER = 78, 308
OUTER_TOP, INNER_TOP, INNER_BOTTOM, OUTER_BOTTOM = 0, 13, 14, 17  # middles of the lips' edges

OUTER_UPPER_LIP = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
OUTER_LOWER_LIP = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
INNER_UPPER_LIP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
INNER_LOWER_LIP = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
INNER_LIPS = INNER_LOWER_LIP + INNER_UPPER_LIP[-2:0:-1]  # a ring
LIP_REDS = (0, 37, 267, 17, 84, 314, 40, 270)

RIGHT_UPPER_LID = (33, 246, 161, 160, 159, 158, 157, 173, 133)
RIGHT_LOWER_LID = (33, 7, 163, 144, 145, 153, 154, 155, 133)
LEFT_UPPER_LID = (362, 398, 384, 385, 386, 387, 388, 466, 263)
LEFT_LOWER_LID = (362, 382, 381, 380, 374, 373, 390, 249, 263)
RIGHT_EYE = RIGHT_LOWER_LID + RIGHT_UPPER_LID[-2:0:-1]  # a ring
LEFT_EYE = LEFT_LOWER_LID[::-1] + LEFT_UPPER_LID[1:-1]  # a ring

RIGHT_BROW_TOP = (70, 63, 105, 66, 107)
RIGHT_BROW_BOTTOM = (46, 53, 52, 65, 55)
LEFT_BROW_TOP = (336, 296, 334, 293, 300)
LEFT_BROW_BOTTOM = (285, 295, 282, 283, 276)
RIGHT_BROW = RIGHT_BROW_TOP + RIGHT_BROW_BOTTOM[::-1]  # a ring
LEFT_BROW = LEFT_BROW_TOP[::-1] + LEFT_BROW_BOTTOM  # a ring

FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)  # a ring
NOSE_OUTLINE = (168, 122, 174, 198, 49, 64, 98, 97, 2, 326, 327, 294, 279, 420, 399, 351)  # a ring
CHEEKS = (205, 425, 50, 280, 101, 330)
MOVED_BY_SPEECH = (
    *(0, 13, 14, 17, 37, 39, 61, 78, 84, 87, 91, 146, 178, 181, 191),
    *(267, 269, 291, 308, 314, 317, 321),
)  # on both lips
STILL_IN_SPEECH = (6, 8, 9, 10, 33, 67, 109, 133, 151, 168, 263, 297, 338, 362)  # forehead, eyes, nose's root
UPPER_FACE = (70, 300, 133, 362, 6)  # the box of both eyes and brows

# The 68 points of the iBUG scheme (300-W, Sagonas et al. 2013) that DWPose and 2DFAN4 give, each as the
# mesh point nearest to its definition: jaw 0-16 at even steps along the oval from ear to ear, brows
# 17-26, bridge 27-30 from the nasion (168) to the tip (4) in thirds, nostrils 31-35, eyes 36-47, outer
# lips 48-59, inner lips 60-67. From the subject's right to the left.
MESH_TO_68 = (
    *(127, 234, 132, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 361, 454, 356),
    *RIGHT_BROW_TOP,
    *LEFT_BROW_TOP,
    *(168, 197, 195, 4, 98, 97, 2, 326, 327),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91),
    *(78, 81, 13, 311, 308, 402, 14, 178),
)


class HeadFrame(NamedTuple):
    """The head's axes in the picture; its right is the picture's, where the subject's left eye is.

    Attributes:
        origin: (2,) pixels, between the lips.
        axes: (2, 2) columns are the head's right and down, pixels per eye distance, foreshortened.
        forward: (2,) pixels that one eye distance towards the viewer's side of the head shifts.
        eye_distance: pixels, not foreshortened.
    """

    origin: np.ndarray
    axes: np.ndarray
    forward: np.ndarray
    eye_distance: float

    def to_head(self, points: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) as (right, down) in eye distances."""
        return (points - self.origin) @ np.linalg.inv(self.axes).T

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """(right, down) in eye distances (..., 2) as pixels."""
        return points @ self.axes.T + self.origin


def head_frame(mesh: np.ndarray) -> HeadFrame:
    """The head's frame from a mesh (478, 3) in pixels."""
    points = mesh.astype(np.float64)
    right = points[LEFT_EYE_OUTER] - points[RIGHT_EYE_OUTER]
    eyes = float(np.linalg.norm(right))
    right /= eyes
    down = points[CHIN] - points[FOREHEAD]
    down -= right * (down @ right)
    down /= np.linalg.norm(down)
    forward = np.cross(right, down)
    axes = np.stack([right[:2], down[:2]], axis=1) * eyes
    inner = points[[*INNER_UPPER_LIP[1:-1], *INNER_LOWER_LIP[1:-1]], :2]
    origin = (inner.mean(axis=0) + points[[INNER_RIGHT_CORNER, INNER_LEFT_CORNER], :2].mean(axis=0)) / 2
    toward_viewer = -np.sign(forward[2]) * forward[:2] * eyes
    return HeadFrame(origin, axes, toward_viewer, eyes)


def distance(meshes: np.ndarray, first: int, second: int) -> np.ndarray:
    """(...) between two points of meshes (..., 478, 2 or 3), in their unit."""
    return np.asarray(np.linalg.norm(meshes[..., first, :] - meshes[..., second, :], axis=-1))


def eye_distance(meshes: np.ndarray) -> np.ndarray:
    """(...) between the eyes' outer corners of meshes (..., 478, 2 or 3), in their unit."""
    return distance(meshes, LEFT_EYE_OUTER, RIGHT_EYE_OUTER)


def mouth_opening(meshes: np.ndarray) -> np.ndarray:
    """(...) between the inner lips in the picture of meshes (..., 478, 2 or 3), eye distances."""
    return distance(meshes[..., :2], INNER_TOP, INNER_BOTTOM) / eye_distance(meshes)


def mouth_width(meshes: np.ndarray) -> np.ndarray:
    """(...) between the mouth's outer corners of meshes (..., 478, 2 or 3), eye distances."""
    return distance(meshes, RIGHT_CORNER, LEFT_CORNER) / eye_distance(meshes)


def smoothstep(x: np.ndarray) -> np.ndarray:
    """(...) 0 where `x` (...) is at most 0, 1 from 1 on, and level at both."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
