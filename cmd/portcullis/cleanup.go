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
		hold     bool
	)
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that Portcullis put into the kernel",
		Long: `Cleanup removes the rules of both iptables families and both backends, the
ipsets, and the mark bits of live connections, in the network namespace it runs
in. Running it again does no harm. While an agent runs there, which would put its
rules back, cleanup refuses: stop the agent first.`,
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
			if err := filter.Cleanup(log, bits); err != nil || !hold {
				return err
			}
			log.Info("cleaned up; waiting for the signal to stop")
			<-cmd.Context().Done()
			return nil
		},
	}
	logs.register(cmd.Flags())
	cmd.Flags().StringVar(&markBits, "mark-bits", defaultMarkBits, "the mark bits that the agent was run with")
	cmd.Flags().BoolVar(&hold, "hold", false, "when all is clean, wait for SIGTERM: a DaemonSet's containers must not end")
	return cmd
}
