"""How a run is observed: the walk at fit start, the watched step with its probes, the replay."""
