// Package e2e tries the portcullis binary on real packets: each test makes a
// lab of network namespaces, runs the agent in the node's, and opens real
// connections between pods. It holds tests only, and they need root.
//
// What should happen is written as rows:
//
//	allow tcp  default/frontend default/db:6379
//	deny  udp6 outside          default/db:6379
//	reach tcp  node             default/db:81
//
// "allow" is an answered connection, "deny" one without any answer, "reach" one
// that got through to a port on which nobody listens. A protocol without 4 or 6
// is tried in each family that both ends have.
package e2e
