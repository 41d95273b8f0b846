package verdict

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
)

// Block is an ipBlock: the addresses of CIDR but those of Except. All prefixes
// are masked, of one family, and each exception lies inside CIDR.
type Block struct {
	CIDR   netip.Prefix
	Except []netip.Prefix
}

// blockEdge says that at a prefix a block begins (opens) or leaves an
// exception out.
type blockEdge struct {
	prefix netip.Prefix
	block  int
	opens  bool
}

// blockSweep walks prefixes from the widest to the narrowest, depth first, and
// keeps count of the blocks that hold at the current one.
type blockSweep struct {
	rowOf  []int  // each block's row
	holds  []bool // each block: does it hold here
	blocks []int  // each row: how many of its blocks hold here
	rows   rows   // rows with at least one
	stack  []blockEdge
}

// blockTrie finds the rows whose blocks hold an address. The entry of each
// prefix names the union of the rows whose blocks cover it, so that the longest
// match alone tells them all. The trie is nil when there is no block.
type blockTrie struct {
	trie *bart.Table[uint32]
	rows rowSets
}

// lookup gives the rows of the longest match, nil for none.
func (b *blockTrie) lookup(a netip.Addr) rows {
	if b.trie == nil {
		return nil
	}
	i, ok := b.trie.Lookup(a)
	if !ok {
		return nil
	}
	return b.rows.at(int(i))
}

// buildBlocks makes the trie over the CIDRs and exceptions of all blocks.
func buildBlocks(blocks []Block, rowOf []int, words, rowCount int) blockTrie {
	var edges []blockEdge
	for i, b := range blocks {
		edges = append(edges, blockEdge{b.CIDR, i, true})
		for _, e := range b.Except {
			edges = append(edges, blockEdge{e, i, false})
		}
	}
	if len(edges) == 0 {
		return blockTrie{}
	}
	slices.SortFunc(edges, func(a, b blockEdge) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()))
	})
	s := blockSweep{
		rowOf:  rowOf,
		holds:  make([]bool, len(blocks)),
		blocks: make([]int, rowCount),
		rows:   newRows(words),
	}
	found := blockTrie{new(bart.Table[uint32]), rowSets{words: words}}
	count := uint32(0)
	for i := 0; i < len(edges); {
		prefix := edges[i].prefix
		s.leaveUntil(prefix)
		for ; i < len(edges) && edges[i].prefix == prefix; i++ {
			s.enter(edges[i])
		}
		found.trie.Insert(prefix, count)
		found.rows.add(s.rows)
		count++
	}
	return found
}

// enter applies an edge, if it changes whether its block holds. (An exception
// inside another one of the same block changes nothing.)
func (s *blockSweep) enter(e blockEdge) {
	if s.holds[e.block] == e.opens {
		return
	}
	s.turn(e.block, e.opens)
	s.stack = append(s.stack, e)
}

// leaveUntil undoes the edges of prefixes that don't contain the next one.
func (s *blockSweep) leaveUntil(next netip.Prefix) {
	for len(s.stack) > 0 {
		top := s.stack[len(s.stack)-1]
		if top.prefix.Bits() <= next.Bits() && top.prefix.Contains(next.Addr()) {
			return
		}
		s.turn(top.block, !top.opens)
		s.stack = s.stack[:len(s.stack)-1]
	}
}

func (s *blockSweep) turn(block int, holds bool) {
	row := s.rowOf[block]
	s.holds[block] = holds
	if holds {
		s.blocks[row]++
	} else {
		s.blocks[row]--
	}
	if s.blocks[row] > 0 {
		s.rows.set(row)
	} else {
		s.rows.clear(row)
	}
}
