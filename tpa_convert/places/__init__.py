"""What a user names: a path that is there, or something on the Hub. Imports nothing slow."""
