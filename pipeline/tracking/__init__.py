"""MLflow: what it should show, what it was sent already, and sending the rest."""
