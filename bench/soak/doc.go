// Package soak lets the agent work for half an hour or so while everything around it
// changes at random: policies, labels, namespaces, pods that come and go and take over
// each other's addresses, agents that end and are killed, rules and sets that others
// take away. Meanwhile connections are made, and a checker that knows nothing of the
// agent's engine says what each of them should have met.
//
// It is built with the tag soak, and run by `make soak`.
package soak
