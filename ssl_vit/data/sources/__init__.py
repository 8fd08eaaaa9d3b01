"""Where images come from: folders, lists, tar shards, torchvision datasets, videos."""
