"""Copies of the engine as a Ray Serve application: on one machine or several, replaced when they die."""
