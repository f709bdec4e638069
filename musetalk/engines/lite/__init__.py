"""The bundled CPU engine: Whisper features → a small mouth network → a landmark mesh warp of the portrait's own pixels."""
