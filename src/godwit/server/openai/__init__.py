"""OpenAI's APIs: chat and text completions, and responses."""
