"""How it is seen: the walk at fit start, the watched step under its probes, the replay."""
