"""An OpenAI-compatible server for a trained model."""
