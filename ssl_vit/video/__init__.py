"""Videos: attention drawn over every frame, and masks that follow an object from frame to frame."""
