"""MuseTalk's networks: a UNet on VAE latents, conditioned on Whisper's features."""
