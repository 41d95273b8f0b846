// Package bench measures the packet's way through Portcullis: decoding,
// deciding and compiling, on clusters that it makes itself.
package bench
