"""Preprocess, render, check caches, describe the service or stay as one, by one of five switches."""

from musetalk.cli import run, service_main
from musetalk.service import IntegratedMuseTalkService

__all__ = ["IntegratedMuseTalkService"]

if __name__ == "__main__":
    run(service_main)
