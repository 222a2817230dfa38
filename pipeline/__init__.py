"""Around the stages: config, identity, storage, running, tracking, audit, serving, and the command line."""
