package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"portcullis/filter"
)

func newCleanupCmd() *cobra.Command {
	var (
		logs     logFlags
		markBits string
	)
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that Portcullis put into the kernel",
		Long: `Cleanup removes the rules of both iptables families and both backends, the
ipsets, and the mark bits of live connections, in the network namespace it runs
in. Running it again does no harm. Stop the agent first: a running one puts its
rules back.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			bits, err := filter.ParseMarkBits(markBits)
			if err != nil {
				return fmt.Errorf("--mark-bits: %w", err)
			}
			return filter.Cleanup(log, bits)
		},
	}
	logs.register(cmd.Flags())
	cmd.Flags().StringVar(&markBits, "mark-bits", defaultMarkBits, "the mark bits that the agent was run with")
	return cmd
}
