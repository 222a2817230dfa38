"""The blocks of a site file, and the rules between them; `cluster/site.py` puts them together."""
