"""What the compiler did: graph dumps and explain."""
