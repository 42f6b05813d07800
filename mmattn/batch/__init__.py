"""Many items in one run: writers for pictures, clips, grids and their metadata."""
