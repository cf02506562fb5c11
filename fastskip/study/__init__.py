"""Find and judge policies: everything here uses a prepared model through its public API."""
