"""Make a template cache from a portrait, clip or folder of images."""

from musetalk.cli import preprocessing_main, run
from musetalk.preprocessing.preprocessor import EnhancedMuseTalkPreprocessor

__all__ = ["EnhancedMuseTalkPreprocessor"]

if __name__ == "__main__":
    run(preprocessing_main)
