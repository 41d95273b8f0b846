// Package whatif answers questions about policy that isn't in force: what would
// become of the connections in a decision log under another state of the
// cluster (Replay), which policies admit what the log saw and nothing else
// (Suggest), and whether policy does what its unit tests expect (Suite).
//
// It is pure: log lines and objects go in, findings come out. Files, the API
// server and the kernel are for others.
package whatif
