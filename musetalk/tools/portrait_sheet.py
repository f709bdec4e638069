"""A picture page: portraits × mouth shapes, to look at what the rig makes of a face.

    python -m musetalk.tools.portrait_sheet sheet.jpg portrait.jpg ... [--side 256] [--zoom 1.0]

Each row is a portrait, untouched and then in nine shapes, blended into its frame as in a video. Two
versions of the rig are compared by laying their pages side by side. docs/portrait_sheet.jpg is the page of
models/lite/portraits/*.jpg with --side 192 --zoom 1.25.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from musetalk.config import LITE_MODELS, PreprocessingConfig
from musetalk.engines.base import FaceFrame
from musetalk.engines.lite.engine import LiteEngine
from musetalk.engines.lite.parameters import PARAMETER_INDEX, RIG_PARAMETERS
from musetalk.errors import NoFaceError
from musetalk.faces.head import BELOW_NOSE_TIP, INNER_BOTTOM, INNER_TOP, eye_distance
from musetalk.native_messages import NativeMessages
from musetalk.templates.template import Template

SHAPES: Mapping[str, Mapping[str, float]] = {
    "silence": {},
    "p": {"lip_press": 1.0, "jaw_open": 0.1},
    "f": {"lip_tuck": 1.0, "jaw_open": 0.12, "upper_lip_raise": 0.3},
    "a": {"jaw_open": 0.75, "lip_open": 0.4, "lower_lip_drop": 0.25},
    "i": {
        "jaw_open": 0.15,
        "lip_open": 0.35,
        "lip_width": 0.7,
        "lower_lip_drop": 0.4,
        "upper_lip_raise": 0.4,
        "smile": 0.3,
    },
    "u": {"jaw_open": 0.18, "lip_open": 0.35, "pucker": 0.9},
    "o": {"jaw_open": 0.5, "lip_open": 0.35, "pucker": 0.6},
    "l": {
        "jaw_open": 0.3,
        "lip_open": 0.4,
        "lower_lip_drop": 0.15,
        "upper_lip_raise": 0.1,
        "tongue_up": 1.0,
    },
    "s": {
        "jaw_open": 0.06,
        "lip_open": 0.4,
        "lip_width": 0.4,
        "lower_lip_drop": 0.45,
        "upper_lip_raise": 0.2,
    },
}
VIEW = 2.1  # eye distances across a picture at zoom 1
LABEL_HEIGHT = 22  # pixels


def parameters_of(shape: Mapping[str, float]) -> np.ndarray:
    """Rig parameters (10,) float32 of a shape given by name and value."""
    parameters = np.zeros(len(RIG_PARAMETERS), np.float32)
    for name, value in shape.items():
        parameters[PARAMETER_INDEX[name]] = value
    return parameters


def portrait_template(frame: np.ndarray, engine: LiteEngine) -> Template:
    """A template of one frame (H, W, 3) uint8 BGR with the default detector, parser and mask.

    Raises:
        NoFaceError: no face in the frame.
    """
    from musetalk.faces.mediapipe import MediapipeDetector
    from musetalk.faces.parsing import LandmarkLabelMapper
    from musetalk.geometry import crop_box
    from musetalk.preprocessing.blend_mask import prepare_mask
    from musetalk.preprocessing.following import face_boxes

    config = PreprocessingConfig()
    face = next(iter(MediapipeDetector().detect(frame)), None)
    if face is None or face.mesh is None:
        raise NoFaceError("no face in the portrait", "use a clear, frontal face")
    bbox = face_boxes([face], frame.shape[:2], config, config.extra_margin)[0]
    label_map = LandmarkLabelMapper().label_map(frame, face, crop_box(bbox))
    cheeks = config.left_cheek_width, config.right_cheek_width
    mask, crop = prepare_mask(label_map, bbox, config.parsing_mode, *cheeks)
    latents = list(engine.encode([FaceFrame(frame, bbox, face.mesh, face.mesh_z)]))
    return Template.from_frames([frame], [bbox], latents, [mask], [crop])


def portrait_row(frame: np.ndarray, engine: LiteEngine, side: int, zoom: float) -> np.ndarray:
    """The portrait and its mouth shapes beside each other, (side, (1 + shapes) × side, 3) uint8 BGR."""
    from musetalk.compositor import paste_back

    template = portrait_template(frame, engine)
    bbox, mask, crop = template.bboxes[0], template.masks[0], template.crop_boxes[0]
    shapes = np.stack([parameters_of(shape) for shape in SHAPES.values()])
    faces = engine.open(template).generate(shapes, [0] * len(shapes))
    pictures = [frame, *(paste_back(frame, face, bbox, mask, crop) for face in faces)]
    mesh = template.latents[0][:, :2] + np.array(bbox[:2])
    return np.hstack([_view(picture, mesh, side, zoom) for picture in pictures])


def _view(picture: np.ndarray, mesh: np.ndarray, side: int, zoom: float) -> np.ndarray:
    import cv2

    scale = side * zoom / (VIEW * float(eye_distance(mesh)))
    centre = mesh[[BELOW_NOSE_TIP, INNER_TOP, INNER_BOTTOM]].mean(axis=0)
    matrix = np.array([[scale, 0, side / 2 - scale * centre[0]], [0, scale, side / 2 - scale * centre[1]]])
    flags = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return cv2.warpAffine(picture, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def portrait_sheet(portraits: Iterable[Path], side: int = 256, zoom: float = 1.0) -> np.ndarray:
    """The page of `portraits`, a row each under a line of labels, uint8 BGR."""
    import cv2

    from musetalk.media.image import read_image

    engine = LiteEngine(LITE_MODELS)
    rows = [portrait_row(read_image(path), engine, side, zoom) for path in portraits]
    labels = np.full((LABEL_HEIGHT, rows[0].shape[1], 3), 255, np.uint8)
    for i, label in enumerate(("portrait", *SHAPES)):
        cv2.putText(
            labels, label, (i * side + 6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (60, 60, 60), 1, cv2.LINE_AA
        )
    return np.vstack([labels, *rows])


def main() -> None:
    """The command: writes the page of the named portraits."""
    import cv2

    parser = argparse.ArgumentParser(description="a picture page: portraits in nine mouth shapes")
    parser.add_argument("output", type=Path, help="picture to write, .jpg or .png")
    parser.add_argument("portraits", type=Path, nargs="+")
    parser.add_argument("--side", type=int, default=256, help="pixels of one picture")
    parser.add_argument("--zoom", type=float, default=1.0, help="1 shows the face, 2 the mouth")
    arguments = parser.parse_args()
    sheet = portrait_sheet(arguments.portraits, arguments.side, arguments.zoom)
    _, data = cv2.imencode(arguments.output.suffix, sheet, [cv2.IMWRITE_JPEG_QUALITY, 86])
    arguments.output.write_bytes(data.tobytes())


if __name__ == "__main__":
    with contextlib.closing(NativeMessages()):
        main()
