"""How a run gets to where it works: one file per kind of site, behind the interface in `launcher.py`."""
