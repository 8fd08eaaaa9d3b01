"""Ground-truth masks: ECSSD-like folders, VOC, DAVIS."""
