"""Whether official networks would load: asked by name, answered by the very functions that engines use."""

from __future__ import annotations

from pathlib import Path

from musetalk.weights.files import find_files, official_paths

GROUPS = ("v15", "v1", "vae", "whisper", "tiny")  # of the weights' registry


def try_network(folder: Path, group: str) -> None:
    """Opens a group's network in the models folder `folder`, its checkpoint checked and not read.

    Raises:
        WeightsError: its files are missing, damaged, hostile or of another network.
        ImportError: a package isn't installed.
    """
    from musetalk.engines.musetalk import networks

    openers = {
        "v15": networks.open_unet,
        "v1": networks.open_unet,
        "vae": networks.open_vae,
        "whisper": networks.open_whisper_encoder,
        "tiny": networks.open_tiny_decoder,
    }
    openers[group](find_files(official_paths(folder, "v1" if group == "v1" else "v15")))
