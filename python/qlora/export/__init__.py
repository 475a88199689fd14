"""Models and adapters in the formats of other runtimes: GGUF for llama.cpp and Ollama, a folder for vLLM."""
