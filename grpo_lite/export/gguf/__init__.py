"""GGUF files for llama.cpp and Ollama: written, given a Modelfile, and compared with the merged model."""
