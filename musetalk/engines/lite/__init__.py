"""The bundled CPU engine: Whisper features, a small mouth network, a warp of the portrait's own pixels."""
