"""Preprocess, render, check caches and describe the service, by one of four switches."""

from musetalk.cli import run, service_main
from musetalk.service import IntegratedMuseTalkService

__all__ = ["IntegratedMuseTalkService"]

if __name__ == "__main__":
    run(service_main)
