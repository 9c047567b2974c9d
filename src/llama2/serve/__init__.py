"""Models over HTTP: the routes of OpenAI, llama.cpp and Ollama, and a chat page, over one engine a model."""
