"""What generates faces: two engines behind one protocol, and the choice between them."""
