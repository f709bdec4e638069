"""Render speech onto a cached template."""

from musetalk.cli import inference_main, run
from musetalk.inference import UltraFastRealtimeInference

__all__ = ["UltraFastRealtimeInference"]

if __name__ == "__main__":
    run(inference_main)
