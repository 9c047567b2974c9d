"""Models over HTTP: the routes of OpenAI, Anthropic, llama.cpp and Ollama, and a chat page; one engine a model."""
