"""Who may ask how much over HTTP: connections, keys, hosts, bodies; metrics and the OpenAPI document."""
