"""Commonsense questions with listed answers, as LLM-Adapters asks them."""
