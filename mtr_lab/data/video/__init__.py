"""Video classification data: files in class folders or CSV lists, generated clips, sampling and decoding."""
