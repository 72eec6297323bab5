"""The ingress replica: vLLM's OpenAI app around a client whose engine is the pipeline of the stages."""
