"""Files: the checkpoint, its manifest, the calibration artefact."""
