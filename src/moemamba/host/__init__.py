"""This machine: its files, its terminal, its folders. No torch here, and nothing about models."""
