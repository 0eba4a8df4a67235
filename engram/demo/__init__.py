"""The demonstration: real pictures stored, recalled from parts, noise and sentences, and strangers refused."""
