"""The tests, in folders by what they look at; `kernel` boots real Linux, the others need nothing."""
