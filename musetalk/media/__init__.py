"""Sound, video and pictures in and out, by ffmpeg and Pillow."""
