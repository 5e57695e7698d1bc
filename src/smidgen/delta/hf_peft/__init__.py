"""Adapter files of HF PEFT, read and written."""
