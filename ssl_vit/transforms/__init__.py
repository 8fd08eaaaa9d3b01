"""From a uint8 picture to what the network sees."""
