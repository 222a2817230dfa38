"""MLflow: what it should show, what it was sent, and sending the rest."""
