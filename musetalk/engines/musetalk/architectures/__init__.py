"""MuseTalk's networks as torch modules, whose parameters are named as the published checkpoints name them.

The decision a reader would question: they are written here though diffusers and transformers have them.
Importing those costs more than loading the weights, and a UNet that runs one timestep, a decoder that
decodes a part of the face and an encoder whose every layer is read need little of what they offer. The
tests hold each module to theirs, key by key and value by value.
"""
